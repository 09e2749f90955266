#!/usr/bin/env bash
# Where the network is: folders that carry vLLM 0.32.0 for CUDA to a machine without one (docs/gpu.md).
#
#   tests/gpu/offline/make_parts.sh [OUT]     writes OUT/part-1 ...; OUT: .gpu, which git ignores
#
#   PARTS="1 2 3"  which; 1 alone is enough for dense models on one GPU of compute capability 9.0
#   KEEP=90        compute capabilities whose code is kept
#   PY=python3     any Python with pip; pip's own configuration says where packages come from
#   WORK=FOLDER    downloads and intermediate files, kept for the next run
#   WHEEL=FILE     vLLM's wheel for CUDA, if it is here already
#
# part-1: vLLM's Python, the dependencies of requirements.txt, _C reduced to KEEP, FlashAttention 3
# part-2: the mixture-of-experts and other extensions, the dependencies of requirements-more.txt
# part-3: _C as it comes, should a kernel of the reduced one fail
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-.gpu}
py=${PY:-python3}
keep=${KEEP:-90}
parts=${PARTS:-1}
work=${WORK:-${TMPDIR:-/tmp}/vllm-parts}
version=0.32.0
core=_C_stable_libtorch.abi3.so
experts=_moe_C_stable_libtorch.abi3.so

for part in $parts; do
    [[ $part == [123] ]] || { echo "make_parts.sh: there is no part $part; PARTS is some of 1 2 3" >&2; exit 2; }
done
mkdir -p "$work" "$out"
work=$(cd "$work" && pwd)
out=$(cd "$out" && pwd)

say() { printf '[parts %4ds] %s\n' "$SECONDS" "$*"; }

download() { # wheels for the other machine's Python and C library, whatever runs here
    local platforms=() glibc
    for glibc in 2_39 2_38 2_37 2_36 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do
        platforms+=(--platform "manylinux_${glibc}_x86_64")
    done
    "$py" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --abi cp312 --abi abi3 --abi none "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

unpack() { # unpack FOLDER WHEEL...: made anew, and under its name only when it is whole
    local folder=$1 wheel
    shift
    [[ -d $folder ]] && return
    rm -rf "$folder.part"
    mkdir -p "$folder.part"
    for wheel in "$@"; do "$py" -m zipfile -e "$wheel" "$folder.part"; done
    mv "$folder.part" "$folder"
}

shrink() { # what an installation does not need to run
    find "$1" -depth \( -name __pycache__ -o -name tests -o -path '*tvm_ffi*/include' \) -type d -exec rm -rf {} +
    find "$1" -type f \( -name '*.pyi' -o -name '*.c' -o -name '*.pyx' -o -name '*.h' -o -name '*.hpp' \) -delete
}

pack() { # pack FILE [tar arguments]: compressed, and under its name only when it is whole
    local file=$1
    shift
    tar cf - --owner=0 --group=0 "$@" | xz -T2 -6 -c >"$file.part"
    mv "$file.part" "$file"
}

reduced() { # reduced NAME: the path of an extension without the code of other GPUs
    local from=$work/vllm/vllm/$1 to=$work/reduced/$keep/vllm/$1
    mkdir -p "$(dirname "$to")"
    # shellcheck disable=SC2086
    [[ -f $to ]] || "$py" "$here/fatbins.py" "$from" "$to" $keep
}

wheel=${WHEEL:-$(find "$work" -maxdepth 1 -name "vllm-$version-*.whl" -print -quit)}
if [[ -z $wheel ]]; then
    say "vLLM $version for CUDA"
    download -d "$work" "vllm==$version"
    wheel=$(find "$work" -maxdepth 1 -name "vllm-$version-*.whl" -print -quit)
fi
unpack "$work/vllm" "$wheel"

for part in $parts; do
    say "part $part"
    mkdir -p "$out/part-$part"
    case $part in
    1)
        [[ -d $work/site ]] || download -d "$work/wheels" -r "$here/requirements.txt"
        unpack "$work/site" "$work"/wheels/*.whl
        shrink "$work/site"
        reduced "$core"
        pack "$out/part-1/python.tar.xz" --exclude='./vllm/*.abi3.so' --exclude=./vllm/vllm-rs --exclude=./vllm/third_party/deep_gemm \
            --exclude=./vllm/third_party/fmha_sm100 --exclude='*.dist-info/RECORD' -C "$work/vllm" . -C "$work/site" .
        pack "$out/part-1/extensions.tar.xz" -C "$work/reduced/$keep" "vllm/$core" \
            -C "$work/vllm" vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
        ;;
    2)
        [[ -d $work/more ]] || download -d "$work/wheels-more" -r "$here/requirements-more.txt"
        unpack "$work/more" "$work"/wheels-more/*.whl
        shrink "$work/more"
        reduced "$experts"
        pack "$out/part-2/more.tar.xz" -C "$work/reduced/$keep" "vllm/$experts" \
            -C "$work/vllm" vllm/_flash{kda,mla,mla_extension}_C.abi3.so vllm/_deepselect_C.abi3.so -C "$work/more" .
        ;;
    3)
        pack "$out/part-3/core.tar.xz" -C "$work/vllm" "vllm/$core"
        ;;
    esac
done
say "done"
du -ab "$out" | sort -k2
