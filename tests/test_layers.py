"""The rooms keep their rules, by what their files import."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "grading", "run")
SCRIPTS = {"train", "evaluate", "perplexity", "merge", "augment", "demo"}
# What of `run` has no memory, and so may serve a room that computes.
FORGETFUL = {"run.errors", "run.files", "run.paths", "run.progress_bar"}
OPTIONAL = {"peft", "bitsandbytes", "torchao", "wandb"}
LONGEST_CHAIN = 5

Imports = dict[str, set[str]]


def read_imports(root: Path, at_once: bool = False) -> Imports:
    """Each product module, and everything that it imports anywhere but for type checkers.

    Args:
        at_once: leave out what it imports when a function is called.
    """
    files = [*root.glob("*.py"), *(file for room in ROOMS for file in (root / room).rglob("*.py"))]
    names = {file: module_name(file.relative_to(root)) for file in files}
    known = set(names.values())
    return {
        name: imported(ast.parse(file.read_text()), known, at_once) - {name}
        for file, name in names.items()
    }


def module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, known: set[str], at_once: bool) -> set[str]:
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef) and at_once:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (modules & known) or {str(node.module)}
        found |= imported(node, known, at_once)
    return found


def broken_rules(imports: Imports) -> list[str]:
    """Each import that a rule forbids, with the rule."""
    broken = []
    for module, targets in imports.items():
        room = module.partition(".")[0]
        for target in targets:
            other = target.partition(".")[0]
            package = target.split(".")[:2]
            rules = {
                "scripts are imported by nobody": other in SCRIPTS,
                "engine computes": room == "engine"
                and (other in ("grading", "data") or (other == "run" and target not in FORGETFUL)),
                "grading never imports torch": room == "grading"
                and other in ("torch", "transformers", "engine", "data"),
                "run imports neither of the others": room == "run"
                and other in ("engine", "grading", "data", "standin"),
                "engine.cpu and engine.cuda have one door": package
                in (["engine", "cpu"], ["engine", "cuda"])
                and module != "engine.device"
                and module.split(".")[:2] != package,
            }
            broken += [
                f"{rule}: {module} imports {target}"
                for rule, is_broken in rules.items()
                if is_broken
            ]
    return broken


def longest_chain(imports: Imports) -> list[str]:
    """The longest chain of imports. Raises RecursionError where there is a cycle."""

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        below = (chain(target) for target in imports[module] if target in imports)
        return (module, *max(below, key=len, default=()))

    return list(max(map(chain, imports), key=len))


def loaded_with(module: str, imports: Imports) -> set[str]:
    """All that an import of ``module`` imports."""
    found, new = set(), {module}
    while new:
        found |= new
        new = set().union(*(imports.get(name, set()) for name in new)) - found
    return found


def optional_packages(imports: Imports) -> list[str]:
    """Each script that imports an optional package when it starts, with the package."""
    return [
        f"{script}: {name}"
        for script in sorted(SCRIPTS)
        for name in sorted(loaded_with(script, imports))
        if name.partition(".")[0] in OPTIONAL
    ]


def test_scripts_start_without_optional_packages() -> None:
    """Guards against an error, and seconds, for what most runs do not use."""
    imports = read_imports(ROOT, at_once=True)
    assert optional_packages(imports) == []
    for module in ("engine.lora", "engine.nf4"):
        assert optional_packages(imports | {"engine.llama": {module}}) != []


def test_the_rooms_keep_their_rules() -> None:
    assert broken_rules(read_imports(ROOT)) == []


def test_imports_have_no_cycle_and_no_long_chain() -> None:
    chain = longest_chain(read_imports(ROOT))
    assert len(chain) - 1 <= LONGEST_CHAIN, " -> ".join(chain)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine/loss.py", "from grading.rules import extract_openai"),
        ("engine/loss.py", "import data"),
        ("engine/loss.py", "from run.config import Config"),
        ("engine/llama.py", "from engine.cpu import onednn"),
        ("engine/llama.py", "def f():\n    import engine.cpu.heap"),
        ("engine/decoding.py", "from engine.cuda.graph import StaticStep"),
        ("engine/cpu/kernels.py", "from engine.cuda.cache import StaticCache"),
        ("grading/rules.py", "import torch"),
        ("grading/rules.py", "from torch.nn import functional"),
        ("grading/rules.py", "from engine import packing"),
        ("run/config.py", "from engine.memory import free_bytes"),
        ("run/config.py", "def f():\n    from grading import rules"),
        ("run/config.py", "import train"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    """Guards against a rule that sees nothing."""
    for file in [
        *ROOT.glob("*.py"),
        *(file for room in ROOMS for file in (ROOT / room).rglob("*.py")),
    ]:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / module).write_text((tmp_path / module).read_text() + f"\n\n{line}\n")
    assert len(broken_rules(read_imports(tmp_path))) >= 1


def test_a_cycle_and_a_long_chain_are_found() -> None:
    with pytest.raises(RecursionError):
        longest_chain({"a": {"b"}, "b": {"a"}})
    links = {str(number): {str(number + 1)} for number in range(6)} | {"6": set()}
    assert len(longest_chain(links)) - 1 == 6


def test_grading_loads_no_torch() -> None:
    """Guards against torch that comes in behind another import."""
    modules = sorted(name for name in read_imports(ROOT) if name.startswith("grading"))
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


NOISY = {"transformers", "peft"}  # they import torchao, which `engine` quiets


def imports_of(node: ast.AST) -> list[str]:
    """The packages and modules that the statements directly in ``node`` import, in order."""
    found: list[str] = []
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.Import):
            found += [alias.name.partition(".")[0] for alias in each.names]
        elif isinstance(each, ast.ImportFrom):
            found.append(str(each.module).partition(".")[0])
    return found


def is_quiet(names: list[str], folders: tuple[Path, ...]) -> bool | None:
    """Whether ``engine`` is imported before what is noisy; None if neither is."""
    for name in names:
        if name == "engine" or name in NOISY:
            return name == "engine"
        for file in (folder / f"{name}.py" for folder in folders):
            if file.is_file():
                inner = is_quiet(imports_of(ast.parse(file.read_text())), folders)
                if inner is not None:
                    return inner
    return None


def test_what_is_started_from_a_shell_imports_engine_before_what_is_noisy() -> None:
    """Guards against lines about torchao's kernels above what a script prints."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), ROOT / "tests" / "conftest.py"]
    noisy = []
    for file in files:
        tree = ast.parse(file.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for scope in (tree, *functions):
            names = imports_of(tree) + (imports_of(scope) if scope is not tree else [])
            if is_quiet(names, (file.parent, ROOT)) is False:
                noisy.append(f"{file.name}: {getattr(scope, 'name', 'imports')}")
    assert noisy == []


def test_files_and_functions_are_short() -> None:
    """A file under 300 lines, a function under 60, the two stories under 90."""
    files = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    long = []
    for file in files:
        text = file.read_text()
        if text.count("\n") > 300:
            long.append(f"{file.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                is_story = (file.stem, node.name) in (("train", "train"), ("evaluate", "evaluate"))
                lines = node.end_lineno - node.lineno + 1
                if lines > (89 if is_story else 60):
                    long.append(f"{file.name}: {node.name} has {lines} lines")
    assert long == []
