#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in ten minutes: the tests marked gpu, then the benchmark. Nothing is installed.
#
#   bash scripts/lab/gpu.sh [OUT_DIR]      from the repository's root
#
# OUT_DIR (default: gpu) gets report.txt, with all that is printed, and bench.json. It exits with 1 if a test failed, or
# if either ran out of time.
set -uo pipefail
python=$(command -v python3 || command -v python)
out=${1:-gpu}
mkdir -p "$out"

everything() {
    local failed=0
    if ! "$python" -c "import batchwise" 2>/dev/null; then
        export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
    fi
    nvidia-smi -L || echo "nvidia-smi found no GPU"
    "$python" - <<'PYTHON' || return 1
import platform, sys
try:
    import lightning, torch, batchwise.trainer
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install it, or put its folder on PYTHONPATH")
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"lightning {lightning.__version__}, batchwise {batchwise.__version__} from {batchwise.__path__[0]}")
PYTHON
    # Without the project's own options, some of which need plugins.
    timeout -k 10 240 "$python" -m pytest tests/batchwise/gpu -m gpu -q -rA --no-header --show-capture=no \
        -p no:cacheprovider -o addopts= --import-mode=importlib || failed=1
    timeout -k 10 330 "$python" scripts/lab/bench_gpu.py --seconds 300 --json "$out/bench.json" || failed=1
    return $failed
}

everything 2>&1 | tee "$out/report.txt"
exit "${PIPESTATUS[0]}"
