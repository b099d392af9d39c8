"""What is in the wheel, and that each kind of installation shows the command of `optimum-cli`."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import optimum_sparse

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(sysconfig.get_config_var("CC").split()[0])
EXTENSION = "optimum_sparse/runtime/_kernels.abi3.so"
TEMPLATES = ROOT / "optimum_sparse" / "report" / "templates"
REGISTER = "optimum.commands.register"

# Says where the package comes from and runs `optimum-cli`, after the .pth files in the folder argv[1] were read.
RUN_CLI = """
import site, sys
site.addsitedir(sys.argv.pop(1))
import optimum_sparse
print(optimum_sparse.__file__)
from optimum_sparse.runtime import kernels
print(kernels.MISSING)
from optimum.commands.optimum_cli import main
main()
"""


def package_folders() -> dict[str, Path]:
    """The import name and folder of every package in the source tree."""
    files = sorted((ROOT / "optimum_sparse").rglob("__init__.py"))
    return {".".join(file.parent.relative_to(ROOT).parts): file.parent for file in files}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree to build from: a build leaves files behind and picks up those of earlier ones."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "optimum_sparse", copy / "optimum_sparse", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.whl")
    return file


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_setup_cfg_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    assert sorted(listed) == sorted([*package_folders(), REGISTER])


def test_wheel_holds_every_module(wheel: Path):
    expected = {
        f"{name.replace('.', '/')}/{file.name}"
        for name, folder in package_folders().items()
        for file in folder.glob("*.py")
    }
    expected |= {"optimum/commands/register/register_sparse.py", "optimum_sparse/py.typed"}
    expected |= {f"optimum_sparse/report/templates/{file.name}" for file in TEMPLATES.iterdir()}
    if COMPILER:
        expected.add(EXTENSION)
    code = {name for name in wheel_files(wheel) if ".dist-info/" not in name}
    assert code == expected


def test_wheel_leaves_the_namespace_packages_of_optimum_alone(wheel: Path):
    ours = {name for name in wheel_files(wheel) if name.startswith("optimum/")}
    assert ours == {"optimum/commands/register/register_sparse.py"}


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE"))
    assert metadata["Name"] == "optimum-sparse"
    assert metadata["Version"] == optimum_sparse.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert b"Apache License" in licence


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installation_shows_the_command(kind: str, source: Path, wheel: Path, tmp_path: Path):
    target = tmp_path / "target"
    what = [str(wheel)] if kind == "wheel" else ["--editable", str(source)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), *what], check=True)

    # Without `site` (-S) no .pth file is read, which hides the editable installation that these tests run from.
    result = subprocess.run(
        [sys.executable, "-S", "-c", RUN_CLI, str(target), "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    imported_from, missing, help_text = result.stdout.split("\n", 2)
    assert Path(imported_from).is_relative_to(target if kind == "wheel" else source)
    assert re.search(r"^ +sparse +\w", help_text, re.MULTILINE), help_text
    assert missing == "None" or not COMPILER


def test_wheel_fits_every_later_python(wheel: Path):
    assert "-cp311-abi3-" in wheel.name


def test_without_a_compiler_the_package_says_what_is_missing(source: Path, tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    shutil.rmtree(source / "build", ignore_errors=True)
    subprocess.run(command, check=True, env=os.environ | {"CC": "no-such-compiler"})
    (file,) = tmp_path.glob("*.whl")
    assert EXTENSION not in wheel_files(file)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "installed")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from optimum_sparse.runtime import kernels as k; "
    code += "print(k.__file__, k.LEVEL, k.MISSING, sep='|')"
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "installed"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    path, level, missing = found.stdout.strip().split("|")
    assert Path(path).is_relative_to(tmp_path)
    assert level == "torch" and "install a C compiler" in missing


def test_optimum_cli_of_this_environment_shows_the_command(tmp_path: Path):
    command = Path(sys.executable).parent / "optimum-cli"
    result = subprocess.run([command, "sparse", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "prune" in result.stdout and "inspect" in result.stdout
