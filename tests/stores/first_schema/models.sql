INSERT INTO checkpoints (id, type, status, owners, created_at, params, error) VALUES
    ('33333333-0000-4000-8000-000000000001', 'Stable-diffusion', 'Active', '{Designer}', '2024-06-01 10:00+00',
     '{"message": "mine", "size": {"one.safetensors": 17}}', NULL),
    ('33333333-0000-4000-8000-000000000002', 'Lora', 'Disabled', '{ann}', '2024-06-02 10:00+00', '{}', 'it is damaged'),
    ('33333333-0000-4000-8000-000000000003', 'Stable-diffusion', 'Initial', '{Designer}', '2024-06-03 10:00+00',
     '{"multipart_upload": {}}', NULL);
INSERT INTO checkpoint_files (checkpoint_id, position, name, key, upload_id, parts_number, complete, reserved, size_bytes,
    sha256) VALUES
    ('33333333-0000-4000-8000-000000000001', 0, 'one.safetensors', 'a/one.safetensors', 'u1', 2, true, true, 17,
     repeat('d', 64)),
    ('33333333-0000-4000-8000-000000000002', 0, 'two.safetensors', 'b/two.safetensors', 'u2', 1, true, false, 5, ''),
    ('33333333-0000-4000-8000-000000000003', 0, 'three.ckpt', 'c/three.ckpt', 'u3', 3, false, true, 0, '');
