"""Where MLX cannot be imported, commands that can do without it work, and the others say what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import troupe
from troupe import errors
from troupe.dataset.files import import_optional
from troupe.errors import DatasetError, ModelError, RewardError, packages_of, remedy
from troupe.policy import hub
from troupe.rewards import load_reward
from troupe.runtime.machine import backend_remedy, missing_backend

ROOT = Path(troupe.__file__).parent.parent
FAULT = "libmlx.so: cannot open shared object file"
TOLD = f"MLX cannot be imported ({FAULT}); "


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder that makes MLX what it is on Linux without a backend."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text(f"raise ImportError({FAULT!r})\n")
    (tmp_path / "bin").mkdir()  # nor is there a compiler, which asks MLX to do without
    return tmp_path


def call(broken: Path, *arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": f"{broken}:{ROOT}", "PATH": str(broken / "bin")}
    ended = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=broken, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="what to install is another thing there")
def test_the_doctor_works_and_says_what_to_install(broken: Path) -> None:
    code, out, err = call(broken, "-m", "troupe", "doctor")
    assert (code, err) == (0, "")
    assert f"to mend: {TOLD}on Linux it needs a backend beside it; in the clone: ./setup.sh" in out
    code, out, _ = call(broken, "-m", "troupe", "doctor", "--json")
    report = json.loads(out)
    assert (report["device"], report["matmul_gflops"]) == ("unknown", None)


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("inspect", "-h"), ("doctor", "-h"), ("report", "--help")]
)
def test_what_needs_no_mlx_works(broken: Path, arguments: tuple[str, ...]) -> None:
    code, out, err = call(broken, "-m", "troupe", *arguments)
    assert (code, err) == (0, "")
    assert out.startswith(("troupe, version ", "Usage: troupe"))


@pytest.mark.parametrize(
    "arguments", [("train", "--lr", "3"), ("generate", "-p", "x"), ("eval", "--help"), ("daemon", "run.toml")]
)
def test_what_needs_it_says_so_in_a_line(broken: Path, arguments: tuple[str, ...]) -> None:
    (broken / "run.toml").write_text('output = "out"\n')
    code, out, err = call(broken, "-m", "troupe", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("troupe: MLX cannot be imported (")
    assert f"{FAULT}); " in err
    assert err.count("\n") == 1
    assert not (broken / "out").exists()


def test_python_is_told_the_same(broken: Path) -> None:
    code, out, err = call(broken, "-c", "import troupe; print(troupe.__version__); troupe.train")
    assert (code, out) == (1, f"{troupe.__version__}\n")
    assert err.splitlines()[-1].startswith(f"ImportError: troupe.train: {TOLD}")


def test_another_import_that_fails_is_told_as_itself() -> None:
    assert missing_backend(ImportError("No module named 'rich'", name="rich")) is None
    assert missing_backend(ModuleNotFoundError("No module named 'mlx'", name="mlx")) is not None


def test_a_wheel_s_user_is_told_packages_not_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert remedy("wandb") == "install Troupe's extra in its clone: pip install -e '.[wandb]'"
    requirements = ["anyio>=4", 'mlx[cpu]>=0.32; extra == "cpu"', "mlx[cuda13]; extra == 'cuda'"]
    requirements += ['math-verify[antlr4_13_2]>=0.9; (python_version > "3") and extra == "math"']
    requirements += ['datasets>=4; extra == "datasets"', 'pyarrow>=18; extra == "datasets"']
    monkeypatch.setattr(errors, "_PARENT", Path("/nowhere"))
    monkeypatch.setattr(errors, "requires", lambda name: requirements)
    monkeypatch.setattr(sys, "executable", "/v/bin/python")
    monkeypatch.setattr(sys, "platform", "linux")
    assert packages_of("datasets") == ["datasets>=4", "pyarrow>=18"]
    assert remedy("datasets") == "install it: /v/bin/python -m pip install 'datasets>=4' 'pyarrow>=18'"
    told = backend_remedy()
    assert "/v/bin/python -m pip install 'mlx[cpu]>=0.32', or for an NVIDIA card" in told
    assert "pip install 'mlx[cuda13]'" in told
    assert "pip install -e" not in told + remedy("math")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"missing; install it: /v/bin/python -m pip install 'math-verify\["):
        load_reward("math_verify")
    with pytest.raises(DatasetError, match=r"install it: /v/bin/python -m pip install 'datasets>=4' 'pyarrow>=18'$"):
        import_optional("no_such_module", "datasets", "x")


def test_a_model_of_the_hub_s_is_fetched_by_a_package_where_there_is_no_clone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for is_clone, told in (
        (True, "fetched by Troupe's extra `hub`, or"),
        (False, "fetched by huggingface_hub (install "),
    ):
        monkeypatch.setattr(hub, "in_clone", lambda is_clone=is_clone: is_clone)
        with pytest.raises(ModelError) as refused:
            hub.resolve_model("Some/Model")
        assert told in str(refused.value)


def test_on_a_mac_it_is_the_system_or_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert backend_remedy().startswith("MLX needs macOS 14 or newer and a native Python of Apple's chips")


def test_every_extra_that_is_named_stands_for_packages() -> None:
    for extra in ("cpu", "cuda", "datasets", "math", "reasoning-gym", "report", "tensorboard", "trackio", "wandb"):
        assert packages_of(extra), extra
