"""Networks, as plain `nn.Module`s without Lightning."""
