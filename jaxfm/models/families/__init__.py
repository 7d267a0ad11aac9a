"""The families of published models: one small file each, and their registry. No jax.

A family file says which pieces a config.json of Hugging Face's layout chooses, and has a table of
weight names; `base.py` reads such a file, `jaxfm.pretrained.layout` such a table, both in both
directions.
"""

# By the model_type of a config.json. An export that may choose takes the first that fits.
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
