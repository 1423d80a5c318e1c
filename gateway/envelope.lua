-- The REST envelope {"statusCode", "data", "message"} (contract 1.4) around what the transcoder made of a gRPC answer, and
-- the base path off the request. Headers that no gRPC server can read go no further. Native gRPC and event streams pass
-- untouched, but for calls that a service cancels when it stops. What the services say about an answer comes as
-- x-esd-status, x-esd-message (percent-encoded), x-esd-raw and x-esd-unwrap (services/common/interceptor.py).

local FILTER = "esd.envelope"
local AWAY = "the service is not available, try again"

local function starts(text, prefix)
  return text ~= nil and text:sub(1, #prefix) == prefix
end

-- The path as the services know it: without the base path, and with the double slashes of hasty clients merged.
local function api_path(path, base)
  local question = path:find("?", 1, true) or #path + 1
  local name, query = path:sub(1, question - 1):gsub("//+", "/"), path:sub(question)
  if base ~= "" and starts(name .. "/", base .. "/") then
    name = name:sub(#base + 1)
  end
  return (name == "" and "/" or name) .. query
end

local GRPC_HEADERS = {
  ["grpc-accept-encoding"] = function() return true end,
  ["grpc-encoding"] = function(value) return value == "identity" or value == "gzip" or value == "deflate" end,
  ["grpc-timeout"] = function(value) return #value < 10 and value:find("^%d+[HMSmun]$") ~= nil end,
}

-- Whether a gRPC server may see this header. What it cannot read is no trifle: it remembers that for the connection,
-- which all callers share, and refuses every later request on it.
local function is_sound(name, value, native)
  if name:find("[^a-z0-9_.:-]") or name:find("%-bin$") then return false end
  if starts(name, "grpc-") then return native and GRPC_HEADERS[name] ~= nil and GRPC_HEADERS[name](value) end
  -- These two may have any bytes: identity reads them from a message, and takes them off.
  return name == "username" or name == "authorization" or not value:find("[^\32-\126]")
end

local function drop_unsound(headers, native)
  local unsound = {}
  for name, value in pairs(headers) do
    if not is_sound(name, value, native) then unsound[#unsound + 1] = name end
  end
  for _, name in ipairs(unsound) do headers:remove(name) end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local native = (headers:get("content-type") or ""):find("^application/grpc$") ~= nil
    or starts(headers:get("content-type"), "application/grpc+") -- what the transcoder leaves alone, and nothing else
  drop_unsound(headers, native)
  if native then
    handle:streamInfo():dynamicMetadata():set(FILTER, "native", true)
    return
  end
  local path = headers:get(":path")
  if path == nil then return end -- CONNECT, which no route takes
  local plain = api_path(path, handle:filterContext():get("base_path"))
  if plain ~= path then
    headers:replace(":path", plain)
    handle:clearRouteCache()
  end
end

local ESCAPES = { ['"'] = '\\"', ["\\"] = "\\\\" }

local function json_string(percent_encoded)
  local text = percent_encoded:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
  return '"' .. text:gsub('[%c"\\]', function(c) return ESCAPES[c] or string.format("\\u%04x", c:byte()) end) .. '"'
end

local function take(headers, name)
  local value = headers:get(name)
  if value ~= nil then headers:remove(name) end
  return value
end

local function text_of(body)
  return body and body:getBytes(0, body:length()) or ""
end

-- The transcoder's types, as its refusals name them, and what a client would call them; all others are objects.
local TYPES = {
  TYPE_STRING = "a text", TYPE_BOOL = "true or false", TYPE_INT32 = "a whole number", TYPE_INT64 = "a whole number",
  TYPE_DOUBLE = "a number", ["type.googleapis.com/google.protobuf.ListValue"] = "a list",
}

-- The transcoder's refusals of a body, which speak of protobuf, in words of JSON. Any other error stays as it is.
local function in_json_words(text)
  if not starts(text, '{"message":"') then return text end
  -- The parser's sentence, then where it stopped, with a caret below.
  text = text:gsub('^{"message":"([^"\\]+%.)(\\[nu].-%^",)', '{"message":"the body is not valid JSON: %1%2')
  text = text:gsub('^{"message":": invalid value oneof field \'[%w_]+\' is already set%. Cannot set \'([%w_]+)\'.-",',
    '{"message":"%1 stands twice in the body",')
  text = text:gsub('^{"message":": Root element must be a message%.', '{"message":"the body must be a JSON object')
  text = text:gsub('^{"message":": Proto field is not repeating, cannot start list%.',
    '{"message":"a list stands where a single value is wanted')
  text = text:gsub('^{"message":"[^"]-: invalid value Starting an object on a scalar field for type ([%w_]+)"',
    '{"message":"%1: a single value is wanted, not an object"')
  return (text:gsub('^({"message":".*) for type ([%w_./]+)"', function(before, type)
    return before .. "; " .. (TYPES[type] or "an object") .. ' is wanted"'
  end))
end

-- {"code":5,"message":"…","details":[]} becomes {"statusCode":404,"message":"…"}.
local function error_body(text, status)
  return (in_json_words(text):gsub('^{"code":%d+', '{"statusCode":' .. status):gsub(',"details":%[%]}$', "}"))
end

local function success_body(text, status, message, unwrap)
  if unwrap and starts(text, '{"data":') then text = text:sub(#'{"data":' + 1, -2) end
  local parts = { '"statusCode":' .. status }
  if text ~= "" and text ~= "{}" then parts[#parts + 1] = '"data":' .. text end
  if message ~= nil and message ~= "" then parts[#parts + 1] = '"message":' .. json_string(message) end
  return "{" .. table.concat(parts, ",") .. "}"
end

function envoy_on_response(handle)
  local marks = handle:streamInfo():dynamicMetadata():get(FILTER)
  local headers = handle:headers()
  if marks ~= nil and marks["native"] then
    if headers:get("grpc-status") == "1" then -- a service that stops cancels what it has not answered
      headers:replace("grpc-status", "14")
      headers:replace("grpc-message", AWAY)
    end
    return
  end
  for _, name in ipairs({ "grpc-status", "grpc-message", "grpc-accept-encoding" }) do take(headers, name) end
  local status, message = take(headers, "x-esd-status"), take(headers, "x-esd-message")
  local raw, unwrap = take(headers, "x-esd-raw"), take(headers, "x-esd-unwrap")
  local http_status, content_type = headers:get(":status"), headers:get("content-type")
  if content_type ~= "application/json" then return end
  if http_status == "499" then -- as above, in JSON
    headers:replace(":status", "503")
    handle:body(true):setBytes('{"statusCode":503,"message":"' .. AWAY .. '"}')
  elseif http_status ~= "200" then -- an error of a service, or of Envoy itself, which has this form already
    local body = handle:body(true)
    body:setBytes(error_body(text_of(body), http_status))
  elseif status ~= nil then
    headers:replace(":status", status)
    if status == "204" then
      handle:body(true):setBytes("")
      headers = handle:headers() -- waiting for the body ended the life of the first one
      headers:remove("content-length")
      headers:remove("content-type")
    elseif raw == nil then
      local body = handle:body(true)
      body:setBytes(success_body(text_of(body), status, message, unwrap ~= nil))
    end
  end
end
