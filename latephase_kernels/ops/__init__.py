"""The contract of every op: schema, checks, fake kernels, autograd and the public function."""
