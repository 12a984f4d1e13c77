"""fastbn for other libraries: one module per library, imported only on request; each needs the extra of its name.

    torch        BatchNorm1d, …, convert, optim; fold(module), from_state_dict, to_state_dict
    sklearn      Standardizer, BatchNormMLPClassifier, BatchNormMLPRegressor
    mpi          SyncBatchNorm, DataParallel              dask         moments, Standardizer, recalibrate
    onnx         fold(model_or_path)                      keras        fold(model), from_layer, to_layer
    arrays       fold(state, pairs): .npz, safetensors, .pt state dicts

Behind folding: graph (what a BatchNorm may fold into, the same for every format), report (what `fold` returns beside
the model), files and verify (behind the command `fastbn fold`).
"""
