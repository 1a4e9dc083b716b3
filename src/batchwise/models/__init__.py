"""Networks: plain `nn.Module`s, no Lightning in them."""
