INSERT INTO endpoints (id, name, type, status, instance_type, autoscaling, num_initial, num_min, num_max, num_live, owners,
    creator, custom_extensions, custom_docker_image_uri, start_time, end_time, error, is_retired) VALUES
    ('22222222-0000-4000-8000-000000000001', 'esd-async-one', 'Async', 'InService', 'any', true, 5, 0, 3, 2, '{Designer}',
     'ann', '', '', '2024-06-01 10:00+00', '2024-06-01 10:01+00', NULL, false),
    ('22222222-0000-4000-8000-000000000002', 'esd-real-time-two', 'Real-time', 'Failed', 'any', false, 2, 0, 1, 0, '{poet}',
     'api', '', '', '2024-06-02 10:00+00', NULL, 'no CUDA here', true),
    ('22222222-0000-4000-8000-000000000003', 'esd-async-one', 'Async', 'Deleting', 'any', false, 1, 0, 1, 1, '{Designer}',
     'ann', '', '', '2024-05-01 10:00+00', '2024-05-01 10:01+00', NULL, false);
INSERT INTO workers (endpoint_id, slot, num_launches, num_failures, was_live, pid, start_time, gpu) VALUES
    ('22222222-0000-4000-8000-000000000001', 0, 1, 0, true, 4242, 'boot/1', '0'),
    ('22222222-0000-4000-8000-000000000001', 1, 3, 1, false, NULL, NULL, NULL);
