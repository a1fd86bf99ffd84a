"""The architecture, held by machine: imports only go down, and composing a config loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import REPOSITORY

# Lowest first: a module may import from its own layer and from those before it.
LAYERS = (
    ("dpo_lab.core", "dpo_lab.distributed", "dpo_lab.errors", "dpo_lab.plugins", "dpo_lab.stats"),
    ("dpo_lab.runs",),
    ("dpo_lab.terminal", "dpo_lab.health"),
    ("dpo_lab.studies",),
    ("dpo_lab.reporting",),
    ("dpo_lab.data",),
    ("dpo_lab.models",),
    ("dpo_lab.evals",),
    ("dpo_lab.rewards",),
    ("dpo_lab.training",),
    ("dpo_lab.config",),
    ("dpo_lab.sweeps",),
    ("dpo_lab.cli",),
    ("dpo_lab.pipelines",),
    ("dpo_lab.inspection", "dpo_lab.planning"),
    (
        "dpo_lab.train",
        "dpo_lab.sft",
        "dpo_lab.reward",
        "dpo_lab.inspect",
        "dpo_lab.evaluate",
        "dpo_lab.report",
        "dpo_lab.push",
        "dpo_lab.new",
    ),
    ("dpo_lab.study",),
    ("dpo_lab.api",),
)


def layer_of(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def imports() -> list[tuple[str, str]]:
    """(module, what it imports) for all of the package, imports inside functions included."""
    found = []
    for path in sorted((REPOSITORY / "dpo_lab").rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dpo_lab"):
                found += [(module, f"{node.module}.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [(module, alias.name) for alias in node.names if alias.name.startswith("dpo_lab")]
    return found


def test_imports_only_go_down():
    found = imports()
    assert len(found) > 50
    upward = [
        f"{module} imports {imported}"
        for module, imported in found
        if (here := layer_of(module)) is not None and ((there := layer_of(imported)) is None or there > here)
    ]
    assert upward == []


def test_every_module_has_a_layer():
    paths = [p for p in (REPOSITORY / "dpo_lab").rglob("*.py") if p.name != "__init__.py"]
    modules = [".".join(p.relative_to(REPOSITORY).with_suffix("").parts) for p in paths]
    assert [m for m in modules if layer_of(m) is None] == []


def test_what_reads_runs_does_not_need_core():
    readers = [f"dpo_lab.{name}" for name in ("runs", "terminal", "health", "stats", "studies", "reporting")]
    crossing = [(m, i) for m, i in imports() if m.startswith(tuple(readers)) and i.startswith("dpo_lab.core")]
    assert crossing == []


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return set(output.stdout.split())


def test_config_and_commands_load_nothing_heavy():
    heavy = {"torch", "lightning", "transformers", "tensorboard", "matplotlib", "scipy"}
    assert (
        loaded_by("import dpo_lab.train, dpo_lab.sft, dpo_lab.reward, dpo_lab.inspect, dpo_lab.evaluate") & heavy
        == set()
    )


def test_the_command_of_reports_loads_neither_hydra_nor_what_trains():
    heavy = {"torch", "lightning", "transformers", "tensorboard", "matplotlib", "scipy", "hydra", "omegaconf"}
    assert loaded_by("import dpo_lab.report") & heavy == set()


def test_core_needs_neither_lightning_nor_hydra_nor_transformers():
    libraries = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for path in (REPOSITORY / "dpo_lab" / "core").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {"torch", "torchmetrics"} <= libraries
    assert libraries & {"lightning", "hydra", "omegaconf", "transformers"} == set()


def test_results_need_no_torch():
    results = (
        "import dpo_lab.runs.run_record, dpo_lab.stats.estimates, dpo_lab.reporting.run_summary, dpo_lab.runs.cache"
    )
    results += ", dpo_lab.runs.examples, dpo_lab.studies.load, dpo_lab.reporting.results_md"
    assert loaded_by(results) & {"torch", "lightning", "transformers"} == set()


def test_notebook_commands_need_neither_lightning_nor_hydra():
    used = "import dpo_lab, torch; x = torch.zeros(2); dpo_lab.dpo_loss(x, x, x, x); dpo_lab.references.Uniform()"
    assert loaded_by(used) & {"lightning", "hydra", "omegaconf"} == set()


def test_files_open_with_what_they_are_for_and_are_short():
    for path in (REPOSITORY / "dpo_lab").rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        assert text == "" or ast.get_docstring(tree), path
        assert text.count("\n") <= 300, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
