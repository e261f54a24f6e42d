"""What a server allows."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Limits of a server; whatever is over one is refused with its name and number."""

    max_batch: int = 4              # trajectories that take a step together
    max_active: int = 8             # trajectories whose contexts are in memory
    max_queue: int = 64             # trajectories that wait for that
    timeout_seconds: float = 600.0  # of a request, waiting counted
    closing_seconds: int = 60       # for requests under way when the server is to end
    body_seconds: float = 30.0      # for a request to arrive
    max_body_mib: int = 16
    max_connections: int = 256
    max_image_pixels: int = 16_000_000
    max_images: int = 4             # shown in one request
    max_texts: int = 32             # said in one request; each is padded to whole `text_multiple`s
    max_tokens: int = 2048          # said in one request, and of one given think text
    max_n: int = 4                  # trajectories of one request
    max_turns: int = 4
    max_timesteps: int = 100
    max_settings: int = 32          # ways to draw, and sizes, beside the configured: each is compiled and kept
    warm_up: bool = True            # compiles the usual ways before the first request

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "warm_up" and getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be positive")
        if self.max_active < self.max_batch:
            raise ValueError(f"max_active is {self.max_active}; let it be max_batch, {self.max_batch}, or more")
