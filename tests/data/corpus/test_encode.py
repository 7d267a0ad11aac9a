from jaxfm.data.corpus import encode
from jaxfm.data.documents import Document


def test_chunks_hold_every_document_once_and_are_not_much_bigger_than_asked(monkeypatch):
    monkeypatch.setattr(encode, 'CHUNK_BYTES', 1000)
    made = [(i % 3 == 0, Document(f'{i}', text='x' * (i % 50))) for i in range(200)]
    chunks = list(encode.read_chunks(iter(made)))
    assert sum(chunks, []) == made
    sizes = [sum(document.num_bytes + 64 for _, document in chunk) for chunk in chunks]
    assert all(1000 <= size < 1114 for size in sizes[:-1])
