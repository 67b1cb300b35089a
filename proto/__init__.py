"""The wire between router and shards: `shard.proto` and the stubs `make proto` builds from it."""
