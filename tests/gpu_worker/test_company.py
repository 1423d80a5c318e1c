"""Who is in the engine: those who had it for themselves are told from those who had not."""

from gpu_worker.company import Company


async def test_who_had_company_is_told_so_also_when_that_has_left() -> None:
    company = Company(lambda: None)
    async with company.joined() as first_had:
        assert not first_had()
        async with company.joined() as second_had:
            pass
        assert first_had()
        assert second_had()
    async with company.joined() as third_had:
        assert not third_had()
