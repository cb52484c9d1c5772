#!/bin/sh
# Check this bundle and install it, without any network:  ./install.sh [FOLDER]     (default /opt/invcoss)
# FOLDER becomes a virtual environment, or is brought to this version if it is one. PYTHON names another interpreter.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
folder=${1:-/opt/invcoss}
python=${PYTHON:-python3}

(cd "$here" && sha256sum --quiet --strict --check SHA256SUMS)

wanted=$(cat "$here/PLATFORM")
is=$("$python" -c 'import sys, sysconfig
print(f"{sys.implementation.name}-{sys.version_info[0]}.{sys.version_info[1]} {sysconfig.get_platform()}")')
if [ "$is" != "$wanted" ]; then
    echo "this bundle is for $wanted, and $python is $is; name another one: PYTHON=python3.x $0" >&2
    exit 1
fi

"$python" -m venv "$folder"
# The machine's own pip settings are left aside: the wheels come from this bundle, each with its checksum, or not at all.
PIP_CONFIG_FILE=/dev/null "$folder/bin/python" -m pip --isolated --disable-pip-version-check install --quiet \
    --no-index --find-links "$here/wheels" --require-hashes --requirement "$here/requirements.txt"
"$folder/bin/pip" check
echo "installed; in $folder/bin: invcoss-server, invcoss-site"
