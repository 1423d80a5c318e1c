-- One job in each state: created, queued, held, running, succeed, failed.
INSERT INTO job (id, owner, task_type, inference_type, status, endpoint_id, endpoint_name, instance_type, models, input_url,
    create_time, payload, num_images, output_id, submit_time, priority_class, cost_seconds, virtual_start, base_model_key,
    passed_over, lease_id, worker_id, is_running, claim_time, start_time, num_claims, num_lost, result_lease, image_names,
    failure, complete_time, timings)
SELECT id::uuid, 'ann', 'txt2img', 'Async', status, '22222222-0000-4000-8000-000000000001', 'esd-async-one', 'any',
    '[{"type": "Stable-diffusion", "name": "one.safetensors", "id": "33333333-0000-4000-8000-000000000001",
       "all_names": ["one.safetensors"], "s3_location": "s3://b/a", "key": "a/one.safetensors", "size_bytes": 17,
       "sha256": "dd"}]',
    'txt2img/infer_v2/x/api_param.json', '2024-06-01 10:00+00', payload::jsonb, 1, NULL, submitted::timestamptz, 1, 2.5,
    virtual_start, 'dd', 0, lease::uuid, worker, running, claimed::timestamptz, started::timestamptz, claims, 0,
    result::uuid, images::jsonb, failure, ended::timestamptz, NULL
FROM (VALUES
    ('44444444-0000-4000-8000-000000000001', 'created', NULL, NULL, NULL, NULL, NULL, false, NULL, NULL, 0, NULL, NULL, NULL,
     NULL),
    ('44444444-0000-4000-8000-000000000002', 'inprogress', '{"prompt": "a cat"}', '2024-06-01 10:01+00', 1.5, NULL, NULL,
     false, NULL, NULL, 0, NULL, NULL, NULL, NULL),
    ('44444444-0000-4000-8000-000000000003', 'inprogress', '{"prompt": "a dog"}', '2024-06-01 10:01+00', 0.5,
     '55555555-0000-4000-8000-000000000003', 'w', false, '2024-06-01 10:02+00', NULL, 1, NULL, NULL, NULL, NULL),
    ('44444444-0000-4000-8000-000000000004', 'inprogress', '{"prompt": "a cow"}', '2024-06-01 10:01+00', 0.7,
     '55555555-0000-4000-8000-000000000004', 'w', true, '2024-06-01 10:02+00', '2024-06-01 10:03+00', 1, NULL, NULL, NULL,
     NULL),
    ('44444444-0000-4000-8000-000000000005', 'succeed', '{"prompt": "a hen"}', '2024-06-01 10:01+00', 0.1, NULL, NULL, false,
     '2024-06-01 10:02+00', '2024-06-01 10:03+00', 1, '55555555-0000-4000-8000-000000000005', '["image_0.png"]', NULL,
     '2024-06-01 10:04+00'),
    ('44444444-0000-4000-8000-000000000006', 'failed', '{"prompt": "a pig"}', '2024-06-01 10:01+00', 0.2, NULL, NULL, false,
     '2024-06-01 10:02+00', '2024-06-01 10:03+00', 3, NULL, NULL, 'the model is damaged', '2024-06-01 10:04+00')
) AS v (id, status, payload, submitted, virtual_start, lease, worker, running, claimed, started, claims, result, images,
        failure, ended);
INSERT INTO worker (endpoint_id, worker_id, stream_id, device, version, last_seen) VALUES
    ('22222222-0000-4000-8000-000000000001', 'w', '66666666-0000-4000-8000-000000000001', 'cpu', 'esd 0.1.0', now());
INSERT INTO user_clock (endpoint_id, username, virtual_time) VALUES
    ('22222222-0000-4000-8000-000000000001', 'ann', 3.5);
INSERT INTO retired_endpoint (endpoint_id, reason) VALUES ('22222222-0000-4000-8000-000000000009', 'it was deleted');
