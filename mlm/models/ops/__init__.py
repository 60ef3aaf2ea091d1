"""Operations of a layer. Hand-written gradients say why they exist, and are tested against plain jnp."""
