"""Rules about the code as a whole that no linter knows. The direction of imports is import-linter's (`make check`)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.internal import api_implementation

from proto import shard_pb2

ROOT = Path(__file__).parents[1]
PROTO = (ROOT / "proto" / "shard.proto").read_text()
PACKAGES = ("router", "shard")
MODULES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text()) for p in PACKAGES for path in (ROOT / p).rglob("*.py")
}

COMMANDS = {"router/__main__.py", "shard/__main__.py", "shard/checkpoint.py", "shard/kernels/build.py"}
"""Where `print` speaks to a person at a terminal."""

LAST_RESORTS = {
    # Foreign code that raises what it likes, turned into an error of ours.
    "router/text/chat.py",
    "router/text/tokenizer.py",
    "shard/model.py",
    # Tops of loops: whatever happens ends the epoch, the sequence or the process, and is logged.
    "router/engine.py",
    "router/group/client.py",
    "shard/__main__.py",
    "shard/server.py",
}
"""Where `except Exception` is right."""


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with what is called, as written: `asyncio.create_task`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def everywhere(find: Callable[[str, ast.Module], Iterator[ast.stmt | ast.expr | ast.excepthandler]]) -> list[str]:
    """The places that `find` objects to: file, line and the code's first line."""
    return [
        f"{name}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for name, tree in MODULES.items()
        for node in find(name, tree)
    ]


# Processes


def import_without(blocked: tuple[str, ...], modules: str) -> None:
    script = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_router_starts_where_torch_is_not_installed() -> None:
    import_without(("torch", "transformers", "safetensors", "gguf", "numpy"), "router.__main__")


def test_a_shard_starts_where_the_router_is_not_installed() -> None:
    import_without(
        ("fastapi", "starlette", "uvicorn", "pydantic", "orjson", "prometheus_client", "router"), "shard.worker"
    )
    import_without(
        ("fastapi", "starlette", "uvicorn", "pydantic", "orjson", "prometheus_client", "router"), "shard.__main__"
    )


def test_protobuf_runs_on_its_c_implementation() -> None:
    assert api_implementation.Type() == "upb", "the pure Python one is ten times slower"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_imports_is_declared(package: str) -> None:
    """An image built with one extra only must start, so nothing may lean on what another extra happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"][package]
    declared = {re.split(r"[=<>\[ ]", requirement)[0] for requirement in requirements}
    distributions = packages_distributions()

    foreign = imported(package) - set(sys.stdlib_module_names) - {"proto", *PACKAGES, "__future__"}

    undeclared = {m for m in foreign if not declared & {d.lower().replace("_", "-") for d in distributions.get(m, [m])}}
    assert undeclared == set()


def imported(package: str) -> set[str]:
    trees = [tree for name, tree in MODULES.items() if name.startswith(f"{package}/")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in plain | named}


# Code


def test_every_thing_has_an_owner() -> None:
    homeless = {"utils", "util", "common", "helpers", "helper", "base", "misc", "manager"}

    assert [name for name in MODULES if Path(name).stem in homeless or homeless & set(Path(name).parts)] == []


def test_no_module_holds_state() -> None:
    """A dict, list or set at module level is a constant: Final, and filled where it stands or of a read-only type."""
    assert everywhere(lambda _, tree: (s for s in tree.body if is_mutable_state(s))) == []


def is_mutable_state(statement: ast.stmt) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return False
        case ast.AnnAssign(annotation=ast.Name(id="Final"), value=value):
            return is_mutable(value) and not is_filled(value)
        case ast.AnnAssign(annotation=ast.Subscript(value=ast.Name(id="Final"), slice=kind), value=value):
            return is_mutable(value) and re.match(r"(dict|list|set|Any)\b|Mutable", ast.unparse(kind)) is not None
        case ast.Assign(value=value) | ast.AnnAssign(value=value):
            return is_mutable(value)
        case _:
            return False


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        made = ast.unparse(value.func).rpartition(".")[2]
        return made in {"dict", "list", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict", "count"}
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


def is_filled(value: ast.expr | None) -> bool:
    match value:
        case ast.Dict(keys=entries) | ast.List(elts=entries) | ast.Set(elts=entries):
            return bool(entries)
        case _:
            return False


def test_no_function_writes_a_global() -> None:
    assert everywhere(lambda _, tree: (n for n in ast.walk(tree) if isinstance(n, ast.Global))) == []


def test_only_commands_print() -> None:
    assert everywhere(lambda name, tree: (c for c, f in calls(tree) if f == "print" and name not in COMMANDS)) == []


def test_exceptions_are_named() -> None:
    def too_wide(name: str, tree: ast.Module) -> Iterator[ast.ExceptHandler]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
                caught = re.findall(r"\w+", ast.unparse(node.type)) if node.type else ["BaseException"]
                if "BaseException" in caught or ("Exception" in caught and name not in LAST_RESORTS):
                    yield node

    assert everywhere(too_wide) == []


def test_last_resorts_are_still_needed() -> None:
    assert [name for name in LAST_RESORTS if "except Exception" not in (ROOT / name).read_text()] == []


def test_every_task_is_kept() -> None:
    """The event loop holds tasks weakly: one that nobody keeps may vanish, and its exception with it."""

    def dropped(_: str, tree: ast.Module) -> Iterator[ast.Expr]:
        for node in ast.walk(tree):
            match node:
                case ast.Expr(value=ast.Call(func=function)):
                    if ast.unparse(function).endswith(("create_task", "ensure_future")):
                        yield node

    assert everywhere(dropped) == []


def test_durations_are_measured_by_a_clock_that_only_goes_forward() -> None:
    assert everywhere(lambda _, tree: (c for c, f in calls(tree) if f in ("time.time", "datetime.now"))) == []


def test_nothing_read_is_run() -> None:
    forbidden_calls = ("eval", "exec", "torch.load", "torch.hub.load")
    forbidden_modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}

    assert everywhere(lambda _, tree: (c for c, f in calls(tree) if f in forbidden_calls)) == []
    assert [package for package in PACKAGES if imported(package) & forbidden_modules] == []
    assert everywhere(lambda _, tree: (c for c, _f in calls(tree) if trusts_remote_code(c))) == []


def trusts_remote_code(call: ast.Call) -> bool:
    return any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in call.keywords)


def test_the_scheduler_has_no_hash_order() -> None:
    """Row order is part of the plan, so nothing in core may depend on the order of a set."""

    def sets(name: str, tree: ast.Module) -> Iterator[ast.expr]:
        if not name.startswith("router/core/"):
            return
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Set | ast.SetComp))
        yield from (call for call, function in calls(tree) if function in ("set", "frozenset", "hash", "id"))

    assert everywhere(sets) == []


# The wire


def messages() -> Iterator[Descriptor]:
    for message in shard_pb2.DESCRIPTOR.message_types_by_name.values():
        assert not message.nested_types_by_name, "the rules below look at the messages of the file's first level only"
        yield message


def test_every_field_and_call_of_the_wire_has_a_comment() -> None:
    lines = [line.strip() for line in PROTO.splitlines()]
    declarations = [
        n for n, line in enumerate(lines) if re.match(r"(rpc\b|(optional |repeated )?[\w.]+ \w+ = \d+;)", line)
    ]

    assert len(declarations) >= sum(len(message.fields) for message in messages())
    assert [lines[n] for n in declarations if not lines[n - 1].startswith("//")] == []


def test_numbers_on_the_wire_keep_their_meaning() -> None:
    """Every field there ever was is a line of tests/data/wire.txt: append a new one, never touch an old one."""
    ever = set((ROOT / "tests/data/wire.txt").read_text().splitlines())

    now = {f"{message.name} {meaning(field)}" for message in messages() for field in message.fields}

    assert sorted(now - ever) == [], "append these lines to tests/data/wire.txt"
    assert [line for line in ever - now if not is_reserved(line)] == [], "reserve the number of a field that is removed"


def meaning(field: FieldDescriptor) -> str:
    kind = field.message_type.name if field.message_type else scalar_name(field.type)
    repeated = "repeated " if field.is_repeated else ""
    return f"{field.number} {repeated}{kind} {field.name}"


def scalar_name(number: int) -> str:
    names: dict[int, str] = {value: name for name, value in FieldDescriptorProto.Type.items()}
    return names[number].removeprefix("TYPE_").lower()


def is_reserved(line: str) -> bool:
    message_name, number, *_ = line.split()
    body = re.search(rf"message {message_name} {{(.*?)^}}", PROTO, re.DOTALL | re.MULTILINE)
    if body is None:
        return True
    reserved = " ".join(re.findall(r"reserved ([\d, ]+);", body[1]))
    return number in re.findall(r"\d+", reserved)


def test_the_readme_shows_every_setting() -> None:
    from router.config import config_table

    assert config_table().strip() in (ROOT / "README.md").read_text()
