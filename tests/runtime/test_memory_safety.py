"""The C code, compiled with AddressSanitizer and UBSan, over random and edge inputs: see fuzz.c."""

import shutil
import subprocess
from pathlib import Path

import pytest

from optimum_sparse.runtime import kernels

SOURCES = Path(kernels.__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    if not (SOURCES / "kernels.c").is_file():
        pytest.skip("the package is installed without its sources")
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if subprocess.run([compiler, *SANITIZE, empty, "-o", tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer")

    program = tmp_path / "fuzz"
    files = [Path(__file__).with_name("fuzz.c"), SOURCES / "kernels.c"]
    options = ["-std=c11", "-O1", "-g", "-Wall", "-Werror", "-Wno-psabi", "-fopenmp", *SANITIZE]
    subprocess.run([compiler, *options, f"-I{SOURCES}", *files, "-lm", "-o", program], check=True)
    result = subprocess.run([program, "200"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[0] == "portable"
