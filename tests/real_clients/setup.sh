#!/usr/bin/env bash
# Installs the clients that tests/real_clients.rs and tests/examples.rs run, and prints where they are:
#
#   setup.sh python DIR   the path of a Python that has what requirements*.txt list
#   setup.sh node DIR     a folder with the *.mjs files and the packages that they import
#
# DIR is where the installations are kept. Once made, one is found again at once; another one is made when the list
# of packages or the interpreter changes. On failure, the last line of stderr says what is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
what=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)

unavailable() {
    echo "$1" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null || unavailable "$1 is not installed"
}

# A name for an installation that follows from all that it is made of.
name() {
    cksum | tr -d ' \n'
}

# The lock only spares work. What makes concurrent calls safe is that an installation is made under a name of its own
# and renamed when it is complete; of two, the second rename fails.
if command -v flock >/dev/null; then
    exec 9>"$dir/.$what.lock"
    flock -w 300 9 || unavailable "another installation does not end"
fi

install_python() {
    local new=$1
    python3 -m venv "$new" >&2 || unavailable "python3 cannot make a virtual environment (python3-venv?)"
    # Byte code is made of what is imported: all of it would be another 200 MB.
    local pip=("$new/bin/python" -m pip install --quiet --disable-pip-version-check --timeout 20 --retries 2
        --no-compile --only-binary :all:)
    "${pip[@]}" -r "$here/requirements.txt" >&2 || unavailable "pip cannot install requirements.txt"
    "${pip[@]}" --no-deps -r "$here/requirements-lm-eval.txt" >&2 ||
        unavailable "pip cannot install requirements-lm-eval.txt"
}

install_node() {
    local new=$1
    mkdir -p "$new"
    cp "$here/package.json" "$here/package-lock.json" "$new"
    npm ci --prefix "$new" --no-audit --no-fund --ignore-scripts --fetch-timeout 20000 --fetch-retries 2 >&2 ||
        unavailable "npm cannot install package.json"
}

case $what in
python)
    have python3
    interpreter=$(python3 -c 'import sys; print(sys.version, sys.base_prefix)')
    final=$dir/venv-$({ echo "$interpreter"; cat "$here"/requirements*.txt; } | name)
    rename=(python3 -c 'import os, sys; os.rename(sys.argv[1], sys.argv[2])')
    ;;
node)
    have node
    have npm
    node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || unavailable "node is older than 20"
    final=$dir/node-$({ node --version; cat "$here/package-lock.json"; } | name)
    rename=(node -e 'require("fs").renameSync(process.argv[1], process.argv[2])')
    ;;
*)
    unavailable "usage: setup.sh python|node DIR"
    ;;
esac

if [[ ! -e $final ]]; then
    new=$final.$$
    trap 'rm -rf "$new"' EXIT
    "install_$what" "$new"
    # A virtual environment finds its packages from where its `python` is, so it may be renamed.
    "${rename[@]}" "$new" "$final" 2>/dev/null || [[ -e $final ]]
fi

if [[ $what == python ]]; then
    echo "$final/bin/python"
else
    # Node looks for packages next to the file that imports them.
    for script in "$here"/*.mjs; do
        copy=$final/$(basename "$script")
        cp "$script" "$copy.$$"
        mv "$copy.$$" "$copy"
    done
    echo "$final"
fi
