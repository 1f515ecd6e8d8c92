"""The checkout is laid out as its README says and holds nothing that does not belong."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

TOP_LEVEL = {
    # the house
    *("pyproject.toml", "proto", "server", "client", "checkpoints", "docker", "tests", "README.md"),
    # what tools need
    *(".ci", ".gitignore", ".pre-commit-config.yaml", ".dockerignore", "LICENSE"),
}

LARGEST_BYTES = 6 << 20
"""Above the largest file that belongs: the real embeddings, 4.9 MB."""


def test_the_top_level_is_as_fixed(tracked):
    assert {path.parts[0] for path in tracked} <= TOP_LEVEL


def test_no_file_is_huge(root, tracked):
    sizes = {path: (root / path).stat().st_size for path in tracked if (root / path).is_file()}
    assert {path: size for path, size in sizes.items() if size > LARGEST_BYTES} == {}


def test_generated_stubs_are_fresh(root, tmp_path):
    generated = tmp_path / "proto"
    generated.mkdir()
    # The documented command, but for where it writes.
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", "proto"),
            *(f"--python_out={generated}", f"--pyi_out={generated}"),
            *(f"--grpc_python_out={generated}", "semid/v1/semid.proto"),
        ],
        cwd=root,
        check=True,
    )
    fresh = sorted(path for path in generated.rglob("*") if path.is_file())
    assert len(fresh) == 3
    for path in fresh:
        committed = root / "proto" / path.relative_to(generated)
        assert path.read_bytes() == committed.read_bytes(), f"{committed} is stale"


def test_every_file_of_a_reference_set_is_tracked(reference_dir, root, tracked):
    on_disk = {path.relative_to(root) for path in reference_dir.rglob("*") if path.is_file()}
    assert on_disk <= set(tracked)


def test_the_demo_encodes_the_embeddings_of_the_tests(root, reference_dir):
    demo_data = root / "server/semid_server/cli/demo_data"
    for name in ("movies.npy", "movies.tsv"):
        digests = {
            hashlib.sha256((folder / name).read_bytes()).digest()
            for folder in (demo_data, reference_dir / "data")
        }
        assert len(digests) == 1, name


@pytest.mark.parametrize("package", ["semid_client", "semid.v1.semid_pb2_grpc"])
def test_the_client_imports_neither_torch_nor_the_server(package):
    heavy = ("torch", "numba", "safetensors", "semid_server", "click", "tqdm")
    script = f"import sys, {package}; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]"
