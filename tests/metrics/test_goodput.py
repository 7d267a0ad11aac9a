"""What records tell of where the time went."""

from jaxfm.metrics import goodput


def test_records_have_every_bucket_and_the_share_of_steps():
    account = {bucket: 2.0 * index for index, bucket in enumerate(goodput.BUCKETS)}
    values = goodput.values(account)
    assert values.pop('goodput/ratio') == account['step'] / sum(account.values())
    assert sum(values.values()) == sum(account.values())
    assert list(values) == [f'goodput/{bucket}_seconds' for bucket in goodput.BUCKETS]


def test_before_any_time_the_share_of_steps_is_none():
    assert goodput.values(dict.fromkeys(goodput.BUCKETS, 0.0))['goodput/ratio'] == 0
