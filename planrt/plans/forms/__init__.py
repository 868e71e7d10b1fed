"""Other forms of plans: files, TorchScript, torch.export, ONNX."""
