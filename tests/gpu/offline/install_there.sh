#!/usr/bin/env bash
# On the machine without network, from a checkout of this project:
#
#   tests/gpu/offline/install_there.sh .gpu/part-1 [SITE]      and further parts, in any order, after part 1
#   . SITE/env.sh                                              in every shell
#
# Unpacks a part into SITE (${TMPDIR:-/tmp}/vllm-site), and makes the checkout usable from there: its `--plugin` too.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
part=${1:?which part? install_there.sh .gpu/part-1 [SITE]}
site=${2:-${TMPDIR:-/tmp}/vllm-site}
mkdir -p "$site"
site=$(cd "$site" && pwd)

unpacking=()
for archive in "$part"/*.tar.xz; do
    # Where tar finds no xz, Python may have it.
    { tar -xJf "$archive" -C "$site" 2>/dev/null || python3 -m tarfile -e "$archive" "$site"; } &
    unpacking+=($!)
done
for each in "${unpacking[@]}"; do
    wait "$each" || { echo "install_there.sh: unpacking $part failed" >&2; exit 1; }
done
[[ -f $site/vllm/__init__.py ]] || { echo "install_there.sh: $site has no vLLM yet: install part 1 too" >&2; exit 1; }

python3 "$root/tests/gpu/offline/link.py" "$root" "$site"

cat >"$site/env.sh" <<ENV
export PYTHONPATH=$root:$site\${PYTHONPATH:+:\$PYTHONPATH}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
# It would compile its sampler with tools that this installation lacks.
export VLLM_USE_FLASHINFER_SAMPLER=0
ENV
echo "installed $(basename "$part") in $site; now: . $site/env.sh"
