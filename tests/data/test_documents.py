import pickle

from jaxfm.data.documents import Document


def test_num_bytes_counts_the_text_or_all_contents():
    turns = ({'role': 'user', 'content': 'é'}, {'role': 'assistant', 'content': 'abc'})
    assert Document('a', text='é漢').num_bytes == 5
    assert Document('a', messages=turns).num_bytes == 5
    assert Document('a').num_bytes == 0


def test_a_document_can_be_pickled():
    document = Document('a', messages=({'role': 'user', 'content': 'é'},), group='g')
    assert pickle.loads(pickle.dumps(document)) == document
