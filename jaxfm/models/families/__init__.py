"""The families of published models: one small file each, and their registry. No jax.

A family file maps config.json values to our blocks and back, and Hugging Face weight names to our
parameters. `base.py` applies the config mapping, `jaxfm.pretrained.layout` the weight names, both
in both directions.
"""

# Keyed by the model_type of config.json. An export without a family uses the first that fits.
FAMILIES = {
    'llama': 'jaxfm.models.families.llama:FAMILY',  # Llama 2, 3, 3.1 to 3.3; SmolLM2
    'qwen3': 'jaxfm.models.families.qwen3:FAMILY',
    'qwen2': 'jaxfm.models.families.qwen2:FAMILY',  # Qwen 2, 2.5
    'mistral': 'jaxfm.models.families.mistral:FAMILY',
    'smollm3': 'jaxfm.models.families.smollm3:FAMILY',
    'gemma2': 'jaxfm.models.families.gemma2:FAMILY',
    'gemma3_text': 'jaxfm.models.families.gemma3:FAMILY',
    'olmo2': 'jaxfm.models.families.olmo2:FAMILY',
    'olmo3': 'jaxfm.models.families.olmo3:FAMILY',
    'phi3': 'jaxfm.models.families.phi3:FAMILY',
}
