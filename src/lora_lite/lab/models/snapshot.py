"""A model's folder: the embedded one's, one given, or a copy of what the hub has."""

from pathlib import Path

from huggingface_hub import snapshot_download

from lora_lite.lab.models.load import model_folder, unreadable

# Other copies of the same weights, which nothing here reads.
OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pkl"]


def local_folder(name: str) -> Path:
    """The folder of a model: "smollm2" (embedded), a local folder, or a hub id, which is fetched whole.

    Raises `ModelError` for a path that leads to no folder, or a hub id that cannot be fetched.
    """
    folder = model_folder(name)
    if Path(folder).is_dir():
        return Path(folder)
    try:
        return Path(snapshot_download(name, ignore_patterns=OTHER_WEIGHTS))
    except (OSError, ValueError) as error:  # no such id, no network, no permission
        raise unreadable(folder, name, error) from error
