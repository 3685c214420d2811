"""The folder that `hf-pss exec` puts on PYTHONPATH. It must hold nothing but sitecustomize."""
