"""A BLAS without a body: NumPy loads it, its sanity check is content, everything else ends the process."""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import capture
from initramfs import hollow, runtime
from initramfs.runtime import Runtime

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86_64 has code for it")

NUMPY = Path(np.__file__).parent
USERS = (*NUMPY.glob("_core/_multiarray_umath*.so"), *NUMPY.glob("linalg/_umath_linalg*.so"))
CALLS_BLAS = {
    "dot", "vdot", "inner", "matmul", "einsum", "tensordot", "linalg", "convolve", "correlate", "polyfit", "cov",
    "corrcoef",
}  # fmt: skip


@pytest.fixture(scope="module")
def blas() -> Path:
    found = [path for path in NUMPY.parent.glob("numpy.libs/*") if hollow.is_blas(path)]
    if len(found) != 1:
        pytest.skip(f"this NumPy does not bring its own BLAS: {found}")
    return found[0]


@pytest.fixture(scope="module")
def body(blas: Path) -> bytes:
    made = hollow.hollow(blas, USERS)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def stand_in(blas: Path, body: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hollow") / blas.name
    path.write_bytes(body)
    return path


def python(stand_in: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": str(stand_in)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_numpy_runs_on_it_and_the_real_one_is_not_loaded(stand_in: Path, blas: Path) -> None:
    done = python(
        stand_in, "import numpy as np; print(np.ones(2, 'f4').dot(np.ones(2, 'f4')), open('/proc/self/maps').read())"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("2.0 ")
    assert str(stand_in) in done.stdout
    assert str(blas) not in done.stdout
    assert "gfortran" not in done.stdout


@pytest.mark.parametrize("call", ["np.ones(2).dot(np.ones(2))", "np.linalg.inv(np.eye(2))", "np.eye(9) @ np.eye(9)"])
def test_what_nobody_may_call_ends_the_process_at_once(call: str, stand_in: Path) -> None:
    assert python(stand_in, f"import numpy as np; {call}").returncode == -signal.SIGILL


@given(
    st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), max_size=20),
    st.sampled_from([1, 2, 3, -1, -2]),
    st.sampled_from([1, 2, -3]),
)
def test_its_one_function_multiplies_vectors(
    stand_in: Path, pairs: list[tuple[int, int]], step: int, other: int
) -> None:
    name = "scipy_cblas_sdot64_"
    function = getattr(ctypes.CDLL(str(stand_in)), name)
    function.restype = ctypes.c_float
    floats = ctypes.POINTER(ctypes.c_float)
    function.argtypes = [ctypes.c_int64, floats, ctypes.c_int64, floats, ctypes.c_int64]

    def strided(values: list[int], by: int) -> ctypes.Array[ctypes.c_float]:
        room = (ctypes.c_float * (len(values) * abs(by) + 1))(*[1e9] * (len(values) * abs(by) + 1))
        for index, value in enumerate(values):
            room[index * by if by > 0 else (len(values) - 1 - index) * -by] = value
        return room

    def first(room: ctypes.Array[ctypes.c_float], by: int) -> ctypes._Pointer[ctypes.c_float]:
        at = 0 if by > 0 else max(0, len(pairs) - 1) * -by
        return ctypes.cast(ctypes.addressof(room) + 4 * at, floats)

    x, y = strided([a for a, _ in pairs], step), strided([b for _, b in pairs], other)
    assert function(len(pairs), first(x, step), step, first(y, other), other) == sum(a * b for a, b in pairs)


def test_it_has_every_symbol_that_is_asked_for_and_is_small(stand_in: Path, body: bytes) -> None:
    assert len(body) < 1 << 14
    library = ctypes.CDLL(str(stand_in))
    with pytest.raises(AttributeError):
        library.cblas_of_nobody  # noqa: B018
    for symbol in ("scipy_cblas_dgemm64_", "scipy_zheevd_64_", "scipy_cblas_sdot64_"):
        assert getattr(library, symbol)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("libscipy_openblas64_-32a4b2a6.so", True),
        ("libopenblas64_p-r0-15028c96.3.21.so", True),
        ("libopenblas.so.0", True),
        ("libblas.so.3", True),
        ("liblapack.so.3", True),
        ("libc.so.6", False),
        ("libblasphemy.so.1", False),
        ("libgfortran.so.5", False),
    ],
)
def test_what_is_a_blas_is_told_by_its_name(name: str, expected: bool) -> None:
    assert hollow.is_blas(Path("/usr/lib") / name) is expected


def test_what_cannot_be_replaced_is_left_alone(blas: Path, tmp_path: Path) -> None:
    libm = next(path for path in runtime.trace(("capture",)).objects if path.name == "libm.so.6")
    assert hollow.hollow(libm, USERS) is None  # its symbols have versions
    assert hollow.hollow(blas, [libm]) is None  # nobody asks for anything
    text = tmp_path / "libblas.so.3"
    text.write_text("INPUT(-lopenblas)")
    assert hollow.hollow(text, USERS) is None
    assert hollow.hollow(blas, [text]) is None


def test_the_traced_runtime_is_without_it(blas: Path, body: bytes) -> None:
    traced = runtime.trace(("capture",))
    assert traced.hollow == {blas: body}
    assert blas not in traced.objects
    assert not [path for path in traced.objects if "gfortran" in path.name or "quadmath" in path.name]


@pytest.mark.parametrize("broken", [b"", b"\x7fELF", b"a text"], ids=["empty", "cut off", "no ELF"])
def test_one_that_does_not_work_is_not_used(broken: bytes, blas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hollow, "hollow", lambda _library, _users: broken)
    assert_as_it_is(runtime.trace(("capture",)), blas)


def test_one_that_lacks_a_symbol_is_not_used(blas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hollow.hollow
    monkeypatch.setattr(hollow, "hollow", lambda library, _users: real(library, USERS[:1]))
    assert_as_it_is(runtime.trace(("capture",)), blas)


def assert_as_it_is(traced: Runtime, blas: Path) -> None:
    assert traced.hollow == {}
    assert blas in traced.objects


def test_nothing_in_capture_calls_a_blas() -> None:
    for source in Path(capture.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_bytes())):
            assert not isinstance(node, ast.MatMult), source
            assert not (isinstance(node, ast.Attribute) and node.attr in CALLS_BLAS), f"{source}: {ast.unparse(node)}"
