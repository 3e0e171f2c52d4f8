#!/bin/bash
# bash smg-bundle/check.sh OUT [--only STEP] [--dry-run]: see docs/gpu.md of the project.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/site:$here/project${PYTHONPATH:+:$PYTHONPATH}"
export SMG_BUNDLE_KERNELS="$here/kernels"
export XDG_CACHE_HOME="$here/cache"
export FLASHINFER_WORKSPACE_BASE="$here/cache"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export SGLANG_ENABLE_JIT_DEEPGEMM=0 PYTHONUNBUFFERED=1
cd "$here/project"
exec python3 -m tools.gpu_bundle.check "$@"
