# Find uv, which installs packages in a tenth of pip's time. Sourced by the scripts in tools/.
# shellcheck shell=bash
_uv_home=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/.setup/uv
_uv_pins=${_uv_home%/.setup/uv}/constraints.txt

_uv_works() { "$1" pip install --help 2> /dev/null | grep -q -e --torch-backend; }

# find_uv [PYTHON ...]: set $uv to a uv that works, or to nothing. Where none is on the PATH, it
# comes from the package index, by the pip (or a new virtual environment) of the first Python that
# can do so; $uv_log gets what pip says.
find_uv() {
    local python new
    for uv in "$(command -v uv || true)" "$_uv_home/bin/uv"; do
        if [ -n "$uv" ] && _uv_works "$uv"; then
            return
        fi
    done
    mkdir -p "$(dirname "$_uv_home")"
    for python in "$@"; do
        new=$(mktemp -d "$_uv_home.XXXXXX")
        if "$python" -m pip --version > /dev/null 2>&1; then
            "$python" -m pip install --retries 1 --constraint "$_uv_pins" \
                --no-user --target "$new" uv
        else
            "$python" -m venv "$new" \
                && "$new/bin/python" -m pip install --retries 1 --constraint "$_uv_pins" uv
        fi >> "${uv_log:-/dev/null}" 2>&1 || true
        if _uv_works "$new/bin/uv"; then
            rm -rf "$_uv_home"
            mv "$new" "$_uv_home"
            uv=$_uv_home/bin/uv
            return
        fi
        rm -rf "$new"
    done
    uv=
}
