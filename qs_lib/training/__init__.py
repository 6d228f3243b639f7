"""The three trainings (champion, baking, reinforcement), their optimizer and their checkpoints."""
