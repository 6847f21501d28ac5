#!/usr/bin/env bash
# Builds the CUDA binary where no CUDA toolkit is installed: what the toolkit needs to compile and link comes from Python packages, which
# are unpacked into one tree.
#
#     benches/gpu/toolkit.sh [CAPABILITY]       90 (H100, H200) unless said; 80 is an A100, 89 an L4 or RTX 40
#
# target/cuda/qcqa is then one file that runs where a driver for CUDA 13 is, and libcublas, libcublasLt, libcurand, libnvrtc and
# libcudart of CUDA 13 are found: an environment with torch has them (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$PWD/target/cuda
site=$work/toolkit
tree=$site/nvidia/cu13
if [ ! -x "$tree/bin/nvcc" ]; then
  python3 -m venv "$work/python"
  "$work/python/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$site" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
    nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.0.2.14 nvidia-curand==10.4.0.35
  chmod +x "$tree"/bin/* "$tree"/nvvm/bin/* 2> /dev/null || true
  ln -sfn lib "$tree/lib64"
  for library in cublas cublasLt curand nvrtc cudart; do
    (cd "$tree/lib" && ln -sf "$(ls "lib$library.so".* | head -n 1)" "lib$library.so")
  done
  # The driver's own library is on the machine that runs it: here a name is enough.
  : > "$work/empty.c"
  cc -shared -o "$tree/lib/libcuda.so" -Wl,-soname,libcuda.so.1 "$work/empty.c"
fi
export CUDA_HOME=$tree CUDA_PATH=$tree CUDA_ROOT=$tree CUDA_TOOLKIT_ROOT_DIR=$tree PATH=$tree/bin:$PATH
export CUDA_COMPUTE_CAP=${1:-90} NVCC_APPEND_FLAGS=--compress-mode=size
# For the link of the binary alone: build scripts must not ask for the driver.
cargo rustc --release --features cli,cuda --bin qcqa -- -L "$tree/lib" -C link-arg=-Wl,--unresolved-symbols=ignore-all \
  -C link-arg=-Wl,--no-as-needed,-lcuda,-lnvrtc,-lcublasLt
strip -o "$work/qcqa" target/release/qcqa
ls -l "$work/qcqa"
