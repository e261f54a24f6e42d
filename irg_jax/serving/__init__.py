"""Generation over HTTP: what requests ask for, who takes a step next, what is answered."""
