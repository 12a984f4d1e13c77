"""fastbn for other libraries: one module per library, imported only on request; each needs the extra of its name.

    onnx         fold(model_or_path)                      torch        fold(module), from_state_dict, to_state_dict
    keras        fold(model)                              arrays       fold(state, pairs): .npz, safetensors, .pt

Behind them: graph (what a BatchNorm may fold into, the same for every format), report (what `fold` returns beside
the model), files and verify (behind the command `fastbn fold`).
"""
