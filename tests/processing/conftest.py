import importlib.util
from importlib import metadata

import pytest


@pytest.fixture(scope="session")
def reference():
    """OpenAI's SimpleTokenizer, loaded by path: importing its package needs torchvision."""
    path = metadata.distribution("openai-clip").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
