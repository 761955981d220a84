"""L0-L2: values, checks, loop events and the four axes; pure functions of plain tensors."""
