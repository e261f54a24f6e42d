"""shapes: the miniature's world. Scenes, their pictures, the words about them, and their judge."""
