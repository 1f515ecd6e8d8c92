#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, format, types, import contracts, the
# protocol, the Dockerfile, the tests. All checks run even if an early one fails; the exit status
# tells of any.
#
#   bash tests/run.sh [arguments for pytest]
#
# On a fresh machine it needs Python 3.11 or newer with venv, bash and a package index. It makes
# .venv-test with the pinned packages of docker/constraints.txt, and keeps it until the pins or
# pyproject.toml change. SEMID_TEST_VENV=DIR names another place for it.
#
# prometheus and promtool (of Debian's package prometheus) are unpacked into that environment where
# the machine has none; without apt their tests are skipped and say so.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

venv=${SEMID_TEST_VENV:-.venv-test}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=${PYTHON:-python3}

die() {
    echo "tests/run.sh: $*" >&2
    exit 1
}

"$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is not Python 3.11 or newer with the venv module; name another with PYTHON=..."

# --- the environment ------------------------------------------------------------------------

wanted=$("$python" - <<'EOF'
import hashlib, pathlib, sys
files = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "docker/constraints.txt")]
print(hashlib.sha256(b"\0".join([sys.version.encode(), *files])).hexdigest())
EOF
) || die "cannot read pyproject.toml and docker/constraints.txt"

if [ "$(cat "$venv/.semid" 2>/dev/null)" != "$wanted" ]; then
    # Only an environment that this script made is ever removed.
    [ ! -e "$venv" ] || [ -e "$venv/.semid" ] ||
        die "$venv exists and was not made by this script; move it, or set SEMID_TEST_VENV"
    echo "== making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv" || die "cannot make a virtual environment in $venv"
    : >"$venv/.semid" # empty: ours, and not finished
    # What is imported is compiled then, and kept: that is a small part.
    install() {
        "$venv/bin/pip" install -q --disable-pip-version-check --no-compile \
            -c docker/constraints.txt "$@" || die "cannot install the pinned packages"
    }
    install pip
    # Most of an installation is a few large packages being unpacked: by two processes, then. What
    # fails here is told by what follows, which needs them if this machine is of their kind.
    (install --no-deps torch llvmlite) 2>/dev/null & (install --no-deps triton pyarrow) 2>/dev/null &
    wait
    install -e '.[dev]'
    echo "$wanted" >"$venv/.semid"
fi
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

# Unpacks the programs of Debian's package: no root needed, and no service is started.
fetch_prometheus() {
    local apt=$venv/apt
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" &&
        (
            cd "$apt" || exit
            options=(-qq -o Dir::State::lists="$apt/lists" -o Dir::Cache="$apt"
                -o APT::Sandbox::User="$(id -un)")
            apt-get "${options[@]}" update &&
                apt-get "${options[@]}" download prometheus &&
                dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin &&
                mv usr/bin/prometheus usr/bin/promtool "$venv/bin/"
        )
    local status=$?
    rm -rf "$apt"
    return $status
}

# The tests start hundreds of processes. Where the machine has Python keep no bytecode (as images
# do that are never written to), each would compile torch and all else anew: 8 s of a core a server.
unset PYTHONDONTWRITEBYTECODE

skipped=0
if ! command -v promtool >/dev/null || ! command -v prometheus >/dev/null; then
    if ! command -v apt-get >/dev/null || ! fetch_prometheus; then
        echo "tests/run.sh: no prometheus, and Debian's package prometheus cannot be had here: its tests are skipped"
        skipped=1
    fi
fi

# --- the checks -----------------------------------------------------------------------------

passed=0 failed=0 summary=()
check() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then
        passed=$((passed + 1))
        summary+=("ok      $name ($((SECONDS - start)) s)")
    else
        failed=$((failed + 1))
        summary+=("FAILED  $name ($((SECONDS - start)) s)")
    fi
}

check lint ruff check .
check format ruff format --check .
check imports lint-imports
check protocol buf lint proto
check dockerfile hadolint docker/Dockerfile
# Beside the tests, most of which wait for another process; what it says follows theirs.
types=$(mktemp) || die "cannot make a temporary file"
mypy >"$types" 2>&1 &
typing=$!
typed() {
    wait $typing
    local status=$?
    cat "$types"
    rm -f "$types"
    return $status
}
# In three processes, each with whole files (tests/conftest.py).
check tests pytest -n 3 --dist loadfile "$@"
check types typed

echo
echo "== summary"
printf '%s\n' "${summary[@]}"
[ $skipped -eq 0 ] || echo "skipped what needs prometheus and promtool"
echo "checks: $passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
