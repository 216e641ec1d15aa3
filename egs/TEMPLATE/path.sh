# Put posinv's Python first on the PATH, after setting it up where that has not been done.
# shellcheck shell=bash
MAIN_ROOT=$(realpath -s "$PWD/../../..")
export MAIN_ROOT
# setup.sh writes activate_python.sh last. Other pins since, or a moved checkout, ask for it again.
_activate=$MAIN_ROOT/tools/activate_python.sh
if [ ! -e "$_activate" ] || [ "$MAIN_ROOT/setup.cfg" -nt "$_activate" ] \
    || [ "$MAIN_ROOT/tools/constraints.txt" -nt "$_activate" ] \
    || [ "$(head -n 1 "$_activate")" != "# For $(realpath "$MAIN_ROOT/tools")" ]; then
    "$MAIN_ROOT/tools/setup.sh"
fi
# shellcheck disable=SC1090
. "$_activate"
export PYTHONPATH=$MAIN_ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUTF8=1 PYTHONIOENCODING=UTF-8 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
