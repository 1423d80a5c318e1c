"""Trains LoRA networks as kohya's sd-scripts do: their configuration, folders, file layout and metadata.

`dataset` reads folders of pictures · `buckets` groups them by shape · `latents` and `texts` make of them what the UNet
reads · `networks` adds what is trained · `steps` is one step · `loop` is a training · `saving`, `state`, `previews` and
`board` are what it leaves behind · `command` is `python -m gpu_worker train`, by hand · `session` and `stream` are a
training of the service.
"""
