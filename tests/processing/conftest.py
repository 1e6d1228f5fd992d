import importlib.util
from importlib import metadata

import pytest


@pytest.fixture(scope="session")
def reference_module():
    """OpenAI's simple_tokenizer.py, loaded by path: importing its package needs torchvision."""
    path = metadata.distribution("openai-clip").locate_file("clip/simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference(reference_module):
    """OpenAI's SimpleTokenizer."""
    return reference_module.SimpleTokenizer()
