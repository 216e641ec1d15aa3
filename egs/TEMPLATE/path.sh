# Put posinv's Python first on the PATH, after setting it up where that has not been done.
# shellcheck shell=bash
MAIN_ROOT=$(realpath -s "$PWD/../../..")
export MAIN_ROOT
# setup.sh writes activate_python.sh last; a setup.cfg changed since asks for new dependencies.
if [ ! -e "$MAIN_ROOT/tools/activate_python.sh" ] \
    || [ "$MAIN_ROOT/setup.cfg" -nt "$MAIN_ROOT/tools/activate_python.sh" ]; then
    "$MAIN_ROOT/tools/setup.sh"
fi
# shellcheck disable=SC1091
. "$MAIN_ROOT/tools/activate_python.sh"
export PYTHONPATH=$MAIN_ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONIOENCODING=UTF-8 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
