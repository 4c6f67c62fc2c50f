"""The prefill engine: the layer after routing as two warp-specialised persistent Gluon kernels, for many pairs an expert (sm_90)."""
