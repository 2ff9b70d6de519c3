"""Target tensorrt_rtx: engines of NVIDIA TensorRT for RTX, built ahead of time for GPUs that need not be here."""
