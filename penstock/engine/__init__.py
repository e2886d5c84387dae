"""What a run means: tasks, flows, futures, states and the session that carries them."""
