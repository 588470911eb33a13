"""LION in a training loop of your own: the layer, the model and what the solver tells.

python examples/custom_loop.py
"""

import torch

import lion_fast

torch.manual_seed(0)

# The layer alone: tokens of width 64 in, tokens of width 64 out, through an equilibrium of width 16.
layer = lion_fast.LionLayer(64, state_dim=16)
tokens = torch.randn(8, 17, 64)
out, info = layer(tokens, return_info=True)
print(f"one layer: {out.shape}, {info.reason} after {info.iterations.float().mean():.1f} iterations")

# A model: a small frozen ViT without pretrained weights, an equilibrium at both ends and a head.
backbone = lion_fast.load_backbone(
    "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=2
)
model = lion_fast.create(backbone, method="lion", num_classes=2, state_dim=16, form="residual")
optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)

images = torch.randn(64, 3, 32, 32)
labels = torch.arange(64) % 2
images[labels == 1] += 0.5  # something to learn

model.train()  # the backbone stays in evaluation mode: frozen means frozen
for step in range(30):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        solver = model.diagnostics()
        iterations, residual = solver["input_iterations"], solver["input_residual"]
        print(
            f"step {step + 1}: loss {loss.item():.3f}, {iterations:.1f} iterations, residual {residual:.1e}"
        )

with torch.no_grad():
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
print(f"accuracy on what it has seen: {accuracy:.2f}")
