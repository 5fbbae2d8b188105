"""What a network needs after training: compiler options and the fused form for inference."""
