#!/usr/bin/env bash
# Builds what is released, checks it, and publishes it; docs/internals/releasing.md has the order of things.
#
#   scripts/release.sh check [TAG]   version, changelog and tag agree
#   scripts/release.sh picture [PAGE]  of a quick start's page, for README and docs/report.md
#   scripts/release.sh sdist         dist/*.tar.gz; its README is rendered as the index does
#   scripts/release.sh wheel         from it, one wheel for this machine and Python, audited
#   scripts/release.sh wheels        from it, wheels for all Pythons, in containers (cibuildwheel)
#   scripts/release.sh try [sdist]   install dist's wheel, or its sdist, without torch, and run what
#                                    needs none
#   scripts/release.sh publish TAG   dist to the index
#   scripts/release.sh page TAG      dist and the changelog to the repository's release page, after it
#
# PYTHON=/path/to/python3 chooses the Python. With LAER_REPOSITORY_URL, the README's links lead to
# that repository, since on the index there is nothing next to it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
    printf '%s\n' "$@" >&2
    exit 2
}

# one PATTERN: the only file of dist that is so called.
one() {
    local found=()
    mapfile -t found < <(compgen -G "dist/$1")
    ((${#found[@]} == 1)) || stop "dist has ${#found[@]} files $1, and one is wanted"
    printf '%s\n' "${found[0]}"
}

# tools GROUP: those of this group of pyproject.toml, in an environment of their own.
tools() {
    local folder=build/$1-tools
    [[ -x $folder/bin/twine ]] || {
        "$python" -m venv --clear "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --group "$1"
    } >&2
    PATH=$PWD/$folder/bin:$PATH
}

check() {
    local version heading
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' megatron_laer/version.py)
    heading=$(grep -m 1 '^## ' CHANGELOG.md)
    [[ $heading == "## $version ("* ]] ||
        stop "CHANGELOG.md begins with '$heading', and the version is $version"
    grep -qx "version: $version" CITATION.cff || stop "CITATION.cff has another version than $version"
    if [[ -n ${1:-} ]]; then
        [[ $1 == "v$version" ]] || stop "the tag '$1' is not v$version"
        [[ $heading =~ \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$ ]] ||
            stop "CHANGELOG.md says '$heading'; give the day, as in ## $version (2026-12-31)"
    fi
    echo "version $version${1:+, tag $1}"
}

# The page of scripts/quickstart.sh, which is run first, on a machine that does nothing else.
picture() {
    "$python" scripts/report_picture.py "$@"
}

sdist() {
    tools release
    rm -rf dist
    python -m build --sdist
    twine check --strict dist/*
}

wheel() {
    local built
    built=$(one '*.tar.gz')
    tools release
    rm -rf build/wheel
    python -m build --wheel --outdir build/wheel "$built"
    twine check --strict build/wheel/*.whl
    auditwheel show build/wheel/*.whl
    # Gives it the name of the oldest glibc that it runs with.
    auditwheel repair --wheel-dir dist build/wheel/*.whl
}

wheels() {
    local built
    built=$(one '*.tar.gz')
    tools release
    cibuildwheel --output-dir dist "$built"
    twine check --strict dist/*.whl
}

try() {
    local built tag packages=() line
    case ${1:-wheel} in
        sdist) built=$(one '*.tar.gz') ;;
        wheel)
            tag=$("$python" -c 'import sys; print("cp{}{}".format(*sys.version_info))')
            built=$(one "*-$tag-$tag-*_$(uname -m).whl")
            ;;
        *) stop "try what? '$1' is neither wheel nor sdist" ;;
    esac
    rm -rf build/try
    "$python" -m venv build/try
    # What needs neither torch nor Megatron, with the bounds of pyproject.toml.
    while read -r line; do packages+=("$line"); done < <(
        sed -n 's/^ *"\(numpy\|packaging\|psutil\|pyyaml\|tqdm\)\(>=[0-9.]*\)",.*/\1\2/p' pyproject.toml
    )
    build/try/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    build/try/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$built"
    cd build/try
    bin/megatron-laer flags tiny-moe
    bin/megatron-laer plan --workload W6 --ranks 8 --config tiny-moe
    echo "$built works"
}

# What CHANGELOG.md says of the version, which `check` has found at its top.
notes() {
    sed -n '/^## /,$ p' CHANGELOG.md | sed -e 1d -e '/^## /,$ d'
}

publish() {
    check "${1:?give the tag}"
    # Nothing but the program that uploads is installed where there are rights to.
    tools publish
    # Credentials are twine's own: TWINE_PASSWORD, or in a workflow the index's trust in it.
    twine upload dist/*
}

# After the index, whose files cannot be replaced; the release page can.
page() {
    check "${1:?give the tag}"
    notes | gh release create "$1" --verify-tag --title "$1" --notes-file - dist/*
}

python=${PYTHON:-python3}
case ${1:-} in
    check | picture | sdist | wheel | wheels | try | publish | page) "$@" ;;
    *) stop "unknown command '${1:-}'; there are check, picture, sdist, wheel, wheels, try, publish and page" ;;
esac
