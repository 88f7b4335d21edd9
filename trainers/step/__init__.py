"""The update step: state, gradients, optimizer."""
