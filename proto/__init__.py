"""The wire between router and shards: `shard.proto`, the stubs `make proto` builds from it, and how gRPC polls.

gRPC's event engine hands every message through several threads of its own. The poller it used before needs half the
context switches and a third less CPU time for a step's plan and output, on cores that the model wants. gRPC reads the
variable when it is first imported, so this package comes first in both processes.
"""

import os

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
