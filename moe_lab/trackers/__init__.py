"""Trackers: MLflow, Trackio, Weights & Biases and TensorBoard get each record after it is written.

`message` says what is sent, `mlflow`, `trackio`, `wandb` and `tensorboard` how (`tracker` has what they share). The
`outbox` decides when: it starts a `sender` process between two groups of cells, for a bounded time. What was sent is
noted beside the record (`notes`). No run executes anything of this room, so it is not part of `code_id`.
"""
